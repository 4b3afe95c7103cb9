"""Plants faults in the code and counts those that the tests catch; see `__main__`."""
