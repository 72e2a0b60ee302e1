"""What a recipe would take of hours, disk, memory and money, before anything is spent: `embedsmith plan`."""
