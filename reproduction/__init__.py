"""The reproduction of the report that this project reimplements: its claims, runs and tables."""
