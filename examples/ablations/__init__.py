"""MM1's ablations in small: the list of runs, the runs, the report."""
