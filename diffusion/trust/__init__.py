"""What is done with what others could have written: names, files, sizes, addresses. Standard library and pydantic only."""
