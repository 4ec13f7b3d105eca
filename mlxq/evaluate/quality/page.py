def check_place(p):
    pass


def write_page(e, p):
    pass
