"""The look of all pages: colours.css and style.css, base.html.j2, and the charts and tables of
parts.html.j2.

page    fills in a template, and how templates write numbers
plots   what matplotlib draws, in the same colours: intervals; SVG for light and dark, and PNG
"""
