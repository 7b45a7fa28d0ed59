"""Expected Attention: the attention that Gaussian future queries would pay, times the norm of the value."""
