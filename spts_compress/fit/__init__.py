"""The proxies, fitted offline a layer at a time: made from weights, refined, sized, and judged on unseen tokens."""
