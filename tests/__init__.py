"""What is promised, one test a promise, one file a room; `python test_all.py` runs them."""
