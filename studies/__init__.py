"""A study: a declared matrix of arms and seeds, run one after another, and the page of what they show."""
