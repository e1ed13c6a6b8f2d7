"""Numbers and images to tables, figures and HTML pages."""
