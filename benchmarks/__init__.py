"""What measures speed, with the yardsticks to compare with."""
