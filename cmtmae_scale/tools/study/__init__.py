"""Tables of runs: method x setting x seed, what is missing of them, and what came of them."""
