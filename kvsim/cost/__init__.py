"""Work to seconds: rates, priors, and the price of a step. No clock."""
