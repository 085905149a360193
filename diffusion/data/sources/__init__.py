"""Where images come from: each kind of source a file, all of them found by `find.py`."""
