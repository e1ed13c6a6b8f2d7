"""Tables, figures and HTML pages made from numbers and images."""
