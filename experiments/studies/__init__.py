"""Studies of Secateur itself: the tables and benchmarks in docs/, each a command with cells that are done once."""
