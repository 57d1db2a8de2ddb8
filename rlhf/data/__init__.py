"""Reading: any preference, demonstration or prompt file into canonical rows, and a count of everything left out."""
