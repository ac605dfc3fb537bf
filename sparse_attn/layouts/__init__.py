"""In which order do tokens stand, and where does one block end? One layout per file; `layout` has what all of them are."""
