"""Built-in questions and preferences: generators by kind, and mixes of them."""
