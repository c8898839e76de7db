"""What the notebooks measure and show: the comparison of arms, the theory, locality, attribution, claims, figures."""
