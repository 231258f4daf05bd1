"""Where Kairos touches SGLang, and what it takes for granted there: data."""
