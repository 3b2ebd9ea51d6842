"""What people see of an evaluation.

table         scores of several models side by side, for terminals, Markdown and HTML
gallery       queries with what is nearest to them, and which classes are confused
feature_map   features of a set in the plane
page          all of it as one HTML file: page.html.j2
"""
