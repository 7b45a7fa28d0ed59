"""Matrix rate at 16 rows: what the matrix units give a decode attention kernel, held in registers."""
