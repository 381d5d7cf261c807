"""What proposes. Each drafter is one file with the methods of `base.Drafter`; the engine knows no more."""
