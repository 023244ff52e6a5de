"""`pitome-vlm web`: a page in the browser that asks one model with and without merging."""
