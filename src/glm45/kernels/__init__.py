"""Fast operators, each beside its plain reference; which one runs is chosen by probing features."""
