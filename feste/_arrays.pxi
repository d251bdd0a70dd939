# The arguments of a kernel: each array is checked for dtype, shape, layout and overlap before anything is written.
#
# A kernel opens with
#
#     cdef Arrays args
#     args.n = 0
#     cdef float* o = output(&args, out, rows, C, "out")
#     cdef const float* px = input(&args, x, rows, C, "x")
#     check_overlap(&args)
#
# so each array and its name stand together once, and no array can be forgotten in the check for overlap. Typed
# memoryviews would check dtype and layout too, but cost 0.8 microseconds a call instead of 0.12.

cdef enum:
    MAX_ARRAYS = 10  # layernorm_backward has nine

cdef dict DTYPE_NAMES = {cnp.NPY_FLOAT32: "float32", cnp.NPY_FLOAT64: "float64", cnp.NPY_INT32: "int32",
                         cnp.NPY_UINT8: "uint8"}


cdef struct Extent:
    char* begin            # the bytes begin .. end of one array
    char* end
    const char* name       # as in the signature of the kernel
    bint written           # an output
    const char* in_place   # the output that may be this very array, or NULL


cdef struct Arrays:
    int n                  # how many have been added
    Extent extents[MAX_ARRAYS]


cdef void* array(Arrays* args, cnp.ndarray x, int dtype, Py_ssize_t rows, Py_ssize_t cols, const char* name,
                 bint written) except NULL:
    """Check x to hold rows x cols elements of a dtype in C order, and add it to args; returns its data.

    Leading dimensions may be cut as one likes: (B, T, C) serves as B * T rows of C columns.
    Raises TypeError for None and ValueError for anything else that does not fit, both with the array's name.
    """
    cdef Extent* extent
    cdef str dtype_name = DTYPE_NAMES[dtype]
    if x is None:
        raise TypeError(f"{name.decode()} must be a {dtype_name} array, got None")
    if (cnp.PyArray_TYPE(x) != dtype or not cnp.PyArray_ISCARRAY_RO(x) or cnp.PyArray_NDIM(x) == 0
            or rows < 1 or cols < 1 or cnp.PyArray_SIZE(x) % cols != 0 or cnp.PyArray_SIZE(x) // cols != rows
            or (rows != 1 and cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != cols) or cnp.PyArray_SIZE(x) == 0
            or (written and not cnp.PyArray_ISWRITEABLE(x))):
        raise ValueError(
            f"{name.decode()} must be a C-contiguous, aligned{', writeable' if written else ''} {dtype_name} array of "
            f"{rows} x {cols} elements, got {(<object>x).dtype} of shape {(<object>x).shape}"
            f"{'' if cnp.PyArray_IS_C_CONTIGUOUS(x) else ', not C-contiguous'}"
            f"{'' if cnp.PyArray_ISWRITEABLE(x) else ', read-only'}")
    if args.n == MAX_ARRAYS:
        raise RuntimeError(f"a kernel has more than {MAX_ARRAYS} arrays: raise MAX_ARRAYS")
    extent = &args.extents[args.n]
    extent.begin = <char*>cnp.PyArray_DATA(x)
    extent.end = extent.begin + cnp.PyArray_NBYTES(x)
    extent.name, extent.written, extent.in_place = name, written, NULL
    args.n += 1
    keep_array(x)
    return cnp.PyArray_DATA(x)


cdef inline float* input(Arrays* args, cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, const char* name) except NULL:
    """A float32 array (rows, cols) that is read."""
    return <float*>array(args, x, cnp.NPY_FLOAT32, rows, cols, name, False)


cdef inline float* optional(Arrays* args, cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols,
                            const char* name) except? NULL:
    """A float32 array (rows, cols) that is read, or NULL for None."""
    return NULL if x is None else <float*>array(args, x, cnp.NPY_FLOAT32, rows, cols, name, False)


cdef inline float* output(Arrays* args, cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, const char* name) except NULL:
    """A float32 array (rows, cols) that is written, or added to."""
    return <float*>array(args, x, cnp.NPY_FLOAT32, rows, cols, name, True)


cdef inline float* optional_output(Arrays* args, cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols,
                                   const char* name) except? NULL:
    """A float32 array (rows, cols) that is written, or NULL for None."""
    return NULL if x is None else <float*>array(args, x, cnp.NPY_FLOAT32, rows, cols, name, True)


cdef int32_t* indices(Arrays* args, cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t bound,
                    const char* name) except NULL:
    """An int32 array (rows, cols) of indices, each checked to lie in 0 .. bound - 1: any other would reach anywhere."""
    cdef int32_t* data = <int32_t*>array(args, x, cnp.NPY_INT32, rows, cols, name, False)
    cdef Py_ssize_t i
    for i in range(rows * cols):
        if data[i] < 0 or data[i] >= bound:
            raise ValueError(f"{name.decode()} must lie in 0 .. {bound - 1}, got {data[i]} at position {i}")
    return data


cdef Py_ssize_t rows_of(cnp.ndarray x, Py_ssize_t C, str name) except -1:
    """How many rows of C elements a table has, where no argument says so."""
    if x is None:
        raise TypeError(f"{name} must be a float32 array, got None")
    if C < 1:
        raise ValueError(f"C must be at least 1, got {C}")
    return cnp.PyArray_SIZE(x) // C


cdef void allow_in_place(Arrays* args, const char* output_name, const char* input_name) noexcept:
    """The output may be the very memory of the input; it must still not overlap it in part."""
    cdef int i
    for i in range(args.n):  # an optional array that was not given is not among them
        if strcmp(args.extents[i].name, input_name) == 0:
            args.extents[i].in_place = output_name


cdef int check_overlap(const Arrays* args) except -1:
    """ValueError if an output shares memory with any other array, unless allow_in_place says that it may."""
    cdef int i, j
    cdef const Extent* out
    cdef const Extent* other
    for i in range(args.n):
        out = &args.extents[i]
        for j in range(args.n if out.written else 0):
            other = &args.extents[j]
            if i == j or other.begin >= out.end or out.begin >= other.end:
                continue
            if other.in_place != NULL and strcmp(other.in_place, out.name) == 0 and other.begin == out.begin:
                continue
            raise ValueError(f"{out.name.decode()} must not overlap {other.name.decode()}")
    return 0


cdef void* scratch(size_t size) except? NULL:
    """The calling thread's work space, of at least size bytes; what an earlier kernel left there is undefined."""
    cdef void* data = workspace(size)
    if data == NULL and size > 0:
        raise MemoryError(f"no memory for a work space of {size} bytes")
    return data
