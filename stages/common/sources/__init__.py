"""Reading tables out of files, packages and Hub repositories, as records."""
