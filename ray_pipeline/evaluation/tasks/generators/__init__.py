"""Questions of the built-in suites: pure functions of a random stream and a level from 1 to 5, with exact answers."""
