"""The tasks of the flow, one a file: each is one box of the picture in docs/architecture.md, and runs twice without harm."""
