"""One model on one device, as the step loop sees it: a plan goes in, tokens come out."""
