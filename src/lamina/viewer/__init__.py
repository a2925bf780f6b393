"""The picture of images as one HTML page: `lamina.view`.

`collect` turns opened images into a model of columns, `rows` bounds their number, `document` and `encode` make text of them,
and `page` puts the text between the parts of the page, which are files in the folder `page`.
"""
