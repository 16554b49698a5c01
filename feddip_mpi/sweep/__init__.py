"""Many runs from one file: the cells of a grid, what is done of them, what they will take, and who runs them."""
