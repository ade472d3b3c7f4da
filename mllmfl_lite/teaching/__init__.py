"""What chapters and scripts share: plots, tables, comparisons. Nothing below imports it."""
