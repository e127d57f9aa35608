"""Start the ranks of a run, let them find each other, and watch over them."""
