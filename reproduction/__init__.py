"""What is about the one report that this project reimplements: its claims, its runs, its tables."""
