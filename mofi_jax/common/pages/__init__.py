"""The look of all pages: style.css, base.html.j2, and the charts and tables of parts.html.j2.

page   fills in a template, and how templates write numbers
"""
