"""The handlers of the seams: the only code that runs inside SGLang's functions."""
