"""From a prompts file to finished videos: jobs, stages, and the loop over them."""
