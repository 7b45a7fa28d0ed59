"""Transform coding of K or V rows: principal components, a bit budget split among them, uniform codes."""
