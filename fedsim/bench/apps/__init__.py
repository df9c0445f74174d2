"""What a study's own processes import, by itself: nothing else of the benchmark weighs on them."""
