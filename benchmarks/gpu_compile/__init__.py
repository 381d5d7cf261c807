"""The launch ledger: programs compiled for an H100 where there is none, and what they would launch."""
