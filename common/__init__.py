"""What every room needs: weight files and settings, command lines, plots."""
