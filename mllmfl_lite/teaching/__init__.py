"""What chapters and scripts share: plots, tables, comparisons, claims read out of texts. Nothing below imports it."""
