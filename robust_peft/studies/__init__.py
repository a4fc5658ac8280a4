"""Many runs at once: the paper's experiments, and figures over run folders."""
