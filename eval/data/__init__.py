"""Questions and problems, and the paper's figures."""
