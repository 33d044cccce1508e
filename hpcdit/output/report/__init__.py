"""The report of a job: one HTML file for people, with nothing to load. What would be faster is the planner's word."""
