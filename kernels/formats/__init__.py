"""How K and V are stored: one file per family of formats, with byte layout, encoder and decoder in plain torch."""
