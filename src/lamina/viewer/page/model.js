// The data of this page, as its script found it; columns are read when they are first needed.

const MODEL = JSON.parse(document.getElementById("document").textContent);
