"""The servers behind the router: their state, their books, and the choice among them."""
