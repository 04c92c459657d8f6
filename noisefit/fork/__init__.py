"""How the branches of a batch run: one forked forward pass or separate ones, and the check that they are the same."""
