"""The data card: what went in, what came out, and why. All stages -> report/.

stage      the stage; report.json holds every number of the page
numbers    counts of pairs; labels: counts of labels; pictures: which are shown
page       the page: page.html.j2, in the look of `mofi_jax.common.pages`
"""
