"""The tasks of the flow, one a file: each is one box of the picture in the README, and runs twice without harm."""
